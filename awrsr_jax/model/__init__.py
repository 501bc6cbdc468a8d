"""The mathematics: attention, its refinement, backbones and losses."""
