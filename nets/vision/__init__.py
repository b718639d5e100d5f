"""Networks for images and volumes, and how to run them on large ones."""
