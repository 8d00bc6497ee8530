"""`python -m macko_llm` is `macko`."""

from macko_llm.cli.main import main

if __name__ == "__main__":
    main()
