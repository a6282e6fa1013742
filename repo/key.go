// SPDX-License-Identifier: BSD-2-Clause

package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/dsync-backup/dsync-backup/repo/backend"
	"github.com/dsync-backup/dsync-backup/repo/crypto"
)

// keyFile is a file below keys/: the master key, sealed with a key that
// scrypt makes from the password. The file itself is plain JSON.
type keyFile struct {
	Created  time.Time `json:"created"`
	Username string    `json:"username"`
	Hostname string    `json:"hostname"`
	KDF      string    `json:"kdf"`
	N        int       `json:"N"`
	R        int       `json:"r"`
	P        int       `json:"p"`
	Salt     []byte    `json:"salt"`
	Data     []byte    `json:"data"`

	// harmed says that the file is not what was written, if it is not: it may open
	// all the same, since its name is no part of what is sealed.
	harmed error
}

// kdfTime is how long opening a new repository takes on the machine that made
// it, as restic has it.
const kdfTime = 500 * time.Millisecond

func (r *Repository) addKey(ctx context.Context, password string, params KDFParams) (err error) {
	if params == (KDFParams{}) {
		if params, err = crypto.Calibrate(kdfTime); err != nil {
			return err
		}
	}
	f := keyFile{Created: time.Now(), KDF: "scrypt", N: params.N, R: params.R, P: params.P, Salt: crypto.NewSalt()}
	f.Hostname, _ = os.Hostname()
	if u, err := user.Current(); err == nil {
		f.Username = u.Username
	}
	userKey, err := crypto.Derive(params, f.Salt, password)
	if err != nil {
		return err
	}
	master, err := json.Marshal(r.key)
	if err != nil {
		return fmt.Errorf("encode master key: %w", err)
	}
	f.Data = userKey.Seal(nil, master)
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	return r.be.Save(ctx, backend.Handle{Type: backend.KeyFile, Name: Hash(data).String()}, data)
}

// findKey tries the password on every key and returns the master key that the
// first fitting one holds.
func findKey(ctx context.Context, be backend.Backend, password string, o Options) (*crypto.Key, error) {
	ids, err := listIDs(ctx, be, backend.KeyFile)
	if err != nil {
		return nil, err
	}
	var damaged error
	for _, f := range ids {
		master, err := tryKey(ctx, be, f.id, password, o)
		switch {
		case err == nil:
			return master, nil
		case errors.Is(err, crypto.ErrUnauthenticated):
			continue
		case ctx.Err() != nil:
			return nil, err
		default:
			// Another key may fit still.
			o.Logger.Warn("skipping a key", "error", err)
			damaged = err
		}
	}
	if damaged != nil {
		return nil, fmt.Errorf("%w (and a key could not be tried: %w)", ErrWrongPassword, damaged)
	}
	return nil, ErrWrongPassword
}

func tryKey(ctx context.Context, be backend.Backend, id ID, password string, o Options) (*crypto.Key, error) {
	f, err := loadKey(ctx, be, id)
	if err != nil {
		return nil, err
	}
	userKey, err := crypto.Derive(crypto.Params{N: f.N, R: f.R, P: f.P}, f.Salt, password)
	if err != nil {
		return nil, fmt.Errorf("decode key %s: %w", id.Str(), err)
	}
	master, err := f.open(id, userKey)
	switch {
	case err == nil:
		f.warn(o)
		if o.Keys != nil {
			o.keep(id, userKey)
		}
	case f.harmed != nil:
		// That the password is wrong is not certain then.
		err = f.harmed
	}
	return master, err
}

// warn says of a key that opened the repository that other programs refuse it.
func (f keyFile) warn(o Options) {
	if f.harmed != nil {
		o.Logger.Warn("the key still opens the repository, and restic refuses it", "error", f.harmed)
	}
}

// CheckKeys calls report with each key file that is damaged or cannot be read; an error
// of report ends it.
func (r *Repository) CheckKeys(ctx context.Context, report func(ID, error) error) error {
	files, err := listIDs(ctx, r.be, backend.KeyFile)
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := r.loadRaw(ctx, backend.KeyFile, f.id); err != nil {
			if err := report(f.id, err); err != nil {
				return err
			}
		}
	}
	return nil
}

func loadKey(ctx context.Context, be backend.Backend, id ID) (f keyFile, err error) {
	data, err := loadNamed(ctx, be, backend.KeyFile, id)
	if errors.Is(err, ErrDamaged) {
		f.harmed = err
	} else if err != nil {
		return f, err
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return f, fmt.Errorf("decode key %s: %w: %w", id.Str(), ErrDamaged, err)
	}
	if f.KDF != "scrypt" {
		return f, fmt.Errorf("decode key %s: key derivation %q is not known", id.Str(), f.KDF)
	}
	return f, nil
}

// open gives the master key that the file holds.
func (f keyFile) open(id ID, userKey *crypto.Key) (*crypto.Key, error) {
	plain, err := userKey.Open(nil, f.Data)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", id.Str(), err)
	}
	master := &crypto.Key{}
	if err := json.Unmarshal(plain, master); err != nil {
		return nil, fmt.Errorf("open key %s: %w", id.Str(), err)
	}
	return master, nil
}

// keep puts what was derived from a password where the next run finds it.
func (o Options) keep(id ID, userKey *crypto.Key) {
	raw, err := json.Marshal(userKey)
	if err == nil {
		err = o.Keys.Put(id.String(), raw)
	}
	if err != nil {
		o.Logger.Warn("going on without keeping the key", "error", err)
	}
}

// findKept looks for a key file that a kept key opens, and returns the master
// key that it holds, or nil.
func findKept(ctx context.Context, be backend.Backend, o Options) (*crypto.Key, error) {
	if o.Keys == nil {
		return nil, nil
	}
	ids, err := listIDs(ctx, be, backend.KeyFile)
	if err != nil {
		return nil, err
	}
	for _, info := range ids {
		raw, err := o.Keys.Get(info.id.String())
		if err != nil {
			o.Logger.Warn("going on without a kept key", "error", err)
			return nil, nil
		}
		if raw == nil {
			continue
		}
		userKey := &crypto.Key{}
		var f keyFile
		var master *crypto.Key
		if err = json.Unmarshal(raw, userKey); err == nil {
			if f, err = loadKey(ctx, be, info.id); err == nil {
				master, err = f.open(info.id, userKey)
			}
		}
		if err == nil {
			f.warn(o)
			return master, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		// It is not what it should be: the password decides.
		o.Logger.Warn("forgetting a kept key", "error", err)
		if err := o.Keys.Drop(info.id.String()); err != nil {
			o.Logger.Warn("forgetting a kept key", "error", err)
		}
	}
	return nil, nil
}
