"""Graphs, routing, mixing weights, collectives and their cost; needs networkx and numpy only."""
