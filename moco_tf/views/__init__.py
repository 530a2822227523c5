"""Images to views: what may be done to an image (`ops`), and the papers' choices of it (`recipes`)."""
