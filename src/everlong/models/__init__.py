"""Models: layers, the language model, presets of published sizes, generation."""
