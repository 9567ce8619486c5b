package postgres

import "context"

// Replace is pending.
func Replace(ctx context.Context, cfg Config, fill func(*Store) error) (aside string, err error) {
	s, err := Open(ctx, cfg)
	if err != nil {
		return "", err
	}
	defer s.Close()
	return "", fill(s)
}
