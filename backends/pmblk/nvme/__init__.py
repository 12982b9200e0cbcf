"""The device model's words: commands, opcodes and status codes (NVM Express Base 2.0, NVM 1.0)."""
