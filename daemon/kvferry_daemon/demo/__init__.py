"""`kvferry demo`: real daemons, real worker processes, a real model, and a verdict."""
