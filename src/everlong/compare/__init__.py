"""The main job: architectures of equal size, trained alike, measured and reported."""
