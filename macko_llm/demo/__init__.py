"""The bundled tiny model, its texts, and the main job run on them."""
