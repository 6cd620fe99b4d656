"""Teaches the intermediate layers to speak: data, recipes, the trainer and what comes out."""
