"""The bundled tiny model, the generator of its text, and the main job run on them."""
