"""What runs a model, behind the interface of `macko_llm.engine`: one file each."""
