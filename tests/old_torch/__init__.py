"""Builds for torch releases before 2.10, each tested in an environment of its own."""
