"""The settings of a run: composed, checked, frozen in its folder. Imports nothing of trainer/; torch-free."""
