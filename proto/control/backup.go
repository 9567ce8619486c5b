package control

import (
	"context"
	"io"

	"google.golang.org/grpc"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// maxBackupPart bounds how many bytes of a backup go into one message.
const maxBackupPart = 256 << 10

// backuperServer is cached's Backuper for remote callers.
type backuperServer struct {
	pb.UnimplementedBackuperServer
	backuper sallyport.Backuper
}

func (s *backuperServer) Backup(_ *pb.BackupRequest, stream grpc.ServerStreamingServer[pb.BackupPart]) error {
	return pulsed(stream.Context(), stream.Send, func(ctx context.Context, send func(*pb.BackupPart) error) error {
		return s.backuper.Backup(ctx, partWriter(send))
	})
}

// partWriter is an io.Writer whose bytes leave as parts of a backup.
type partWriter func(*pb.BackupPart) error

func (send partWriter) Write(b []byte) (n int, err error) {
	for n < len(b) {
		part := b[n:min(len(b), n+maxBackupPart)]
		if err := send(&pb.BackupPart{Data: part}); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// backuper is the Backuper of cached at the other end of a client.
type backuper struct{ client *Client }

// Backup implements sallyport.Backuper. It ends, with CodeUnavailable, when nothing
// was heard for Silence; what w has then is no whole backup.
func (b backuper) Backup(ctx context.Context, w io.Writer) error {
	open := func(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ServerStreamingClient[pb.BackupPart], error) {
		return pb.NewBackuperClient(conn).Backup(ctx, &pb.BackupRequest{})
	}
	return receive(ctx, b.client, open, func(m *pb.BackupPart) error {
		_, err := w.Write(m.GetData())
		return err
	})
}
