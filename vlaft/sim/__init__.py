"""A small simulated robot: a tabletop, a scripted expert, and the loop that lets a policy act."""
