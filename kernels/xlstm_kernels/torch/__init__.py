"""The operators in plain torch: any device, any dtype."""
