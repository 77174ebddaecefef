"""Does a model fit, how fast can it be at best, and on which mesh: told without the machine."""
