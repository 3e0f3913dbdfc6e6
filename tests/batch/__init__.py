"""Tests of many images at once: the batch, its journal and reports, a fleet of workers."""
