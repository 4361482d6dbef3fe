"""``lightning-mst report``: the results of experiments and sweeps in one table and one picture."""
