package postgres_test

import (
	"strconv"
	"testing"

	"sallyport/cached/storetest"
)

func BenchmarkStore(b *testing.B) {
	storetest.Bench(b, func(b *testing.B) storetest.Engine {
		database := cluster.Database(b)
		return storetest.Engine{
			Store: open(b, config(b, cluster.URL(database))), Bars: storetest.PostgresBars,
			Size: func() (int64, error) {
				return strconv.ParseInt(cluster.Query(b, database, `pg_database_size(current_database())`), 10, 64)
			},
		}
	})
}
