"""Tests of seeds: what a first-boot program installs the agent from."""
