"""Kinds of training stage: what a step trains on, and its loss. May ask settings/, ranks/ and engine/."""
