"""Measuring a network: accuracies under attack, and whether they can be trusted."""
