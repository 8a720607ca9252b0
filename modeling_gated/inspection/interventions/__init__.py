"""Changes of what a model computes, to see what its predictions lose."""
