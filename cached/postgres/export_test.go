package postgres

// Stepping has step told before each step of a replacement.
func Stepping(cfg Config, step func()) Config {
	cfg.step = step
	return cfg
}
