"""Comparisons: arms that differ in what one asks about, trained on the same seeds and measured on the same images."""
