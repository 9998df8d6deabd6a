"""Files in and out: particle files, STAR tables, image stacks; written atomically."""
