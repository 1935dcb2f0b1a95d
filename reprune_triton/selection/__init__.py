"""From weights to the filters that stay: widths, clustering, cut, coverage, regrowth."""
