"""Kinds of training stage: what a step trains on, and its loss. May import settings/, ranks/ and engine/."""
