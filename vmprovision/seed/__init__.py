"""The plan of an injection as data for a guest's own first-boot program: no image is written to."""
