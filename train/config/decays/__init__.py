"""One file per weight decay: its fields, its checks, and the link of the chain that it builds."""
