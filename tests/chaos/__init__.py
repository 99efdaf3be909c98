"""Chaos: seeded trials that kill everything a sweep is made of, damage its store, and demand the undisturbed result."""
