"""Which depth each text gets: score tables, the oracle over them, routers fitted on them."""
