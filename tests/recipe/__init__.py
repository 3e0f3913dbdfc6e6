"""Tests of images from recipes."""
