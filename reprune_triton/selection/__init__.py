"""Selection, from weights to active filters: widths, clustering, cut, coverage, regrowth."""
