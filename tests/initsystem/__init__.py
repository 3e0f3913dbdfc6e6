"""Tests of the services that each init system gets."""
