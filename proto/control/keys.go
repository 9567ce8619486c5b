package control

import (
	"context"
	"time"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// keyKeeper is a client of cached's row keys.
type keyKeeper struct{ rpc pb.KeysClient }

var _ sallyport.KeyKeeper = keyKeeper{}

// RowKeys implements sallyport.KeyKeeper.
func (k keyKeeper) RowKeys(ctx context.Context) (sallyport.KeyRing, error) {
	m, err := k.rpc.Status(ctx, &pb.KeysRequest{})
	if err != nil {
		return sallyport.KeyRing{}, err
	}
	ring := sallyport.KeyRing{KEK: m.GetKek()}
	for _, d := range m.GetKeys() {
		ring.Keys = append(ring.Keys, sallyport.DataKey{ID: d.GetId(), Created: time.Unix(0, d.GetCreated()).UTC(), Rows: d.GetRows()})
	}
	return ring, nil
}

// RotateRowKey implements sallyport.KeyKeeper.
func (k keyKeeper) RotateRowKey(ctx context.Context) error {
	_, err := k.rpc.Rotate(ctx, &pb.KeysRequest{})
	return err
}

// RetireRowKeys implements sallyport.KeyKeeper.
func (k keyKeeper) RetireRowKeys(ctx context.Context) error {
	_, err := k.rpc.Retire(ctx, &pb.KeysRequest{})
	return err
}

// keysServer is cached's sallyport.KeyKeeper for operators.
type keysServer struct {
	pb.UnimplementedKeysServer
	keys sallyport.KeyKeeper
}

func (s *keysServer) Status(ctx context.Context, _ *pb.KeysRequest) (*pb.KeyRing, error) {
	ring, err := s.keys.RowKeys(ctx)
	if err != nil {
		return nil, err
	}
	m := &pb.KeyRing{Kek: ring.KEK}
	for _, d := range ring.Keys {
		m.Keys = append(m.Keys, &pb.DataKey{Id: d.ID, Created: d.Created.UnixNano(), Rows: d.Rows})
	}
	return m, nil
}

func (s *keysServer) Rotate(ctx context.Context, _ *pb.KeysRequest) (*pb.KeysDone, error) {
	return &pb.KeysDone{}, s.keys.RotateRowKey(ctx)
}

func (s *keysServer) Retire(ctx context.Context, _ *pb.KeysRequest) (*pb.KeysDone, error) {
	return &pb.KeysDone{}, s.keys.RetireRowKeys(ctx)
}
