"""An injection's plan as data for a guest's own first-boot program; the image is not written to."""
