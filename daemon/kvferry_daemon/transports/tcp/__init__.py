"""The embedded network transport: blocking threads between pool and socket."""
