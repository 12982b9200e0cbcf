"""Software RAID: where data and redundancy lie (pure), and the engine that keeps it so."""
