"""What a run is: composed, typed, checked, and frozen in its folder. Asks nobody in trainer/; torch-free."""
