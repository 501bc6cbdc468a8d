"""From a checkpoint to recommendations, explanations and an artefact that runs without this package."""
