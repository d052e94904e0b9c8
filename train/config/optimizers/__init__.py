"""One file per optimizer: its fields, its checks, and the link of the chain that it builds."""
