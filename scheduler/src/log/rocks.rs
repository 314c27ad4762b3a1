//! The log in RocksDB: records by position, one column family per index, and the head with the stream's identity.
//!
//! One write batch per append, its WAL synced before the append returns. Readers open the directory as a secondary,
//! also while a scheduler writes it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hearth_protocol::chain::Hash;
use hearth_protocol::{Seq, WallMs};
use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, Direction, IteratorMode, Options, ReadOptions,
    WriteBatch, WriteOptions,
};

use super::index::{self, Group, HEAT};
use super::{Entry, EventLog, Head, Index, LAYOUT, LogError, Record};

const META: &str = "meta";
const HEAD: &[u8] = b"head";
const IDENTITY: &[u8] = b"stream";
/// The directory's layout as u32 big-endian; directories of layout 1 have no such entry.
const LAYOUT_KEY: &[u8] = b"layout";
const THINNED: &[u8] = b"thinned";

/// Where snapshots are, within the directory.
const SNAPSHOTS: &str = "snapshots";

/// Bytes of memory for one column family's fresh writes before they become a file.
const WRITE_BUFFER_BYTES: usize = 32 << 20;

/// Bytes of WAL kept: bounds the time that opening takes after a kill.
const WAL_BYTES_MAX: u64 = 128 << 20;

type KeyValue = (Box<[u8]>, Box<[u8]>);

/// A log in a directory.
pub struct RocksLog {
    db: DB,
    dir: PathBuf,
    head: Head,
    /// A reader's own scratch directory, removed with it; `None` for the writer.
    scratch: Option<PathBuf>,
}

impl std::fmt::Debug for RocksLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RocksLog({}, head {})", self.dir.display(), self.head.seq)
    }
}

fn families() -> impl Iterator<Item = &'static str> {
    Group::ALL.iter().map(|group| group.name()).chain([META])
}

fn store_options() -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_bottommost_compression_type(DBCompressionType::Zstd);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_keep_log_file_num(4);
    // A torn tail of the WAL is what a kill leaves behind, and was never acknowledged. What was, the stream still
    // has, and the acknowledged position held there shows the loss.
    options.set_wal_recovery_mode(rocksdb::DBRecoveryMode::PointInTime);
    // Secondaries need every file open.
    options.set_max_open_files(-1);
    options
}

fn judge_layout(dir: &Path, value: &[u8]) -> Result<(), LogError> {
    match <[u8; 4]>::try_from(value).map(u32::from_be_bytes) {
        Ok(layout) if layout <= LAYOUT => Ok(()),
        Ok(layout) => Err(LogError::Newer {
            dir: dir.into(),
            found: format!("its layout is {layout}, this build knows up to {LAYOUT}"),
        }),
        Err(_) => Err(LogError::Damaged {
            dir: dir.into(),
            seq: Seq(0),
            why: "its layout cannot be read".into(),
        }),
    }
}

/// Looks at a directory's layout before it is opened for writing: that alone makes RocksDB write files anew. Whatever
/// else is wrong with it, opening it says.
fn refuse_newer(dir: &Path) -> Result<(), LogError> {
    let Ok(db) = DB::open_cf_for_read_only(&store_options(), dir, [META], false) else {
        return Ok(());
    };
    let layout = db
        .cf_handle(META)
        .and_then(|meta| db.get_cf(meta, LAYOUT_KEY).ok().flatten());
    layout.map_or(Ok(()), |value| judge_layout(dir, &value))
}

impl RocksLog {
    /// Opens the log of a directory for writing, or starts one.
    ///
    /// # Errors
    /// [`LogError::Store`] also when another scheduler has it open; [`LogError::Damaged`] when its head and its
    /// records do not fit each other.
    pub fn open(dir: &Path) -> Result<Self, LogError> {
        std::fs::create_dir_all(dir).map_err(|source| LogError::Directory {
            dir: dir.into(),
            source,
        })?;
        refuse_newer(dir)?;
        let mut options = store_options();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        let descriptors = families().map(|name| ColumnFamilyDescriptor::new(name, store_options()));
        let db = DB::open_cf_descriptors(&options, dir, descriptors).map_err(|source| {
            // RocksDB wants every family named: one more than ours was made by a later build.
            if source.as_ref().contains("olumn families not opened") {
                return LogError::Newer {
                    dir: dir.into(),
                    found: source.to_string(),
                };
            }
            store(dir, "opening it", source)
        })?;
        let log = Self::from_db(db, dir, None)?;
        let mut batch = WriteBatch::default();
        batch.put_cf(log.family(META), LAYOUT_KEY, LAYOUT.to_be_bytes());
        log.write(batch)?;
        Ok(log)
    }

    /// Opens a directory for reading, also while a scheduler writes it. [`RocksLog::refresh`] reads on.
    ///
    /// # Errors
    /// [`LogError::Directory`] when there is no log, else as [`RocksLog::open`].
    pub fn open_reader(dir: &Path) -> Result<Self, LogError> {
        static READERS: AtomicU64 = AtomicU64::new(0);
        std::fs::metadata(dir.join("CURRENT")).map_err(|source| LogError::Directory {
            dir: dir.into(),
            source,
        })?;
        let number = READERS.fetch_add(1, Ordering::Relaxed);
        let scratch = std::env::temp_dir().join(format!("hearth-log-reader-{}-{number}", std::process::id()));
        let descriptors = families().map(|name| ColumnFamilyDescriptor::new(name, store_options()));
        let db = DB::open_cf_descriptors_as_secondary(&store_options(), dir, &scratch, descriptors)
            .map_err(|source| store(dir, "opening it for reading", source))?;
        let mut log = Self::from_db(db, dir, Some(scratch))?;
        log.refresh()?;
        Ok(log)
    }

    fn from_db(db: DB, dir: &Path, scratch: Option<PathBuf>) -> Result<Self, LogError> {
        let mut log = Self {
            db,
            dir: dir.into(),
            head: Head::default(),
            scratch,
        };
        log.check_layout()?;
        log.head = log.stored_head()?;
        Ok(log)
    }

    fn check_layout(&self) -> Result<(), LogError> {
        match self.meta(LAYOUT_KEY)? {
            None => Ok(()),
            Some(value) => judge_layout(&self.dir, &value),
        }
    }

    /// The identity of the stream it was filled from; `None` before it was.
    ///
    /// # Errors
    /// A failure of the store.
    pub fn identity(&self) -> Result<Option<String>, LogError> {
        let identity = self.meta(IDENTITY)?;
        Ok(identity.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn snapshot_path(&self, at: Seq) -> PathBuf {
        self.dir.join(SNAPSHOTS).join(format!("{at}.snapshot"))
    }

    fn io(&self, source: std::io::Error) -> LogError {
        LogError::Directory {
            dir: self.dir.clone(),
            source,
        }
    }

    /// Catches up with what the writer appended since. Does nothing for the writer itself.
    ///
    /// # Errors
    /// As [`RocksLog::open`].
    pub fn refresh(&mut self) -> Result<(), LogError> {
        if self.scratch.is_some() {
            self.db
                .try_catch_up_with_primary()
                .map_err(|source| store(&self.dir, "catching up with its writer", source))?;
            self.head = self.stored_head()?;
        }
        Ok(())
    }

    fn damaged(&self, seq: Seq, why: impl Into<String>) -> LogError {
        LogError::Damaged {
            dir: self.dir.clone(),
            seq,
            why: why.into(),
        }
    }

    /// The head as stored, if the last record agrees with it.
    fn stored_head(&self) -> Result<Head, LogError> {
        let last = self.last_record()?;
        let Some(value) = self.meta(HEAD)? else {
            return match last {
                None => Ok(Head::default()),
                Some(record) => Err(self.damaged(record.seq, "there are records and no head")),
            };
        };
        let head = decode_head(&value).ok_or_else(|| self.damaged(Seq(0), "the head cannot be read"))?;
        match last {
            Some(record) if record.seq == head.seq && record.chain == head.chain => Ok(head),
            Some(record) => Err(self.damaged(
                head.seq.min(record.seq.next()),
                format!("the last record is {}, the head says {}", record.seq, head.seq),
            )),
            None => Err(self.damaged(Seq(1), format!("there are no records, the head says {}", head.seq))),
        }
    }

    fn last_record(&self) -> Result<Option<Record>, LogError> {
        self.db
            .iterator(IteratorMode::End)
            .next()
            .map(|item| self.record(item))
            .transpose()
    }

    fn record(&self, item: Result<KeyValue, rocksdb::Error>) -> Result<Record, LogError> {
        let (key, value) = item.map_err(|source| store(&self.dir, "reading records", source))?;
        let key: [u8; 8] = (*key)
            .try_into()
            .map_err(|_| self.damaged(Seq(0), format!("a record's key has {} bytes", key.len())))?;
        let seq = Seq(u64::from_be_bytes(key));
        Record::decode(seq, &value).map_err(|why| self.damaged(seq, why))
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family was opened")
    }

    fn meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, LogError> {
        self.db
            .get_cf(self.family(META), key)
            .map_err(|source| store(&self.dir, "reading its head", source))
    }

    fn write(&self, batch: WriteBatch) -> Result<(), LogError> {
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        self.db
            .write_opt(batch, &synced)
            .map_err(|source| store(&self.dir, "a synced write", source))
    }
}

impl Drop for RocksLog {
    fn drop(&mut self) {
        if let Some(scratch) = &self.scratch {
            // Left behind it costs a few kilobytes in the temporary directory.
            let _ = std::fs::remove_dir_all(scratch);
        }
    }
}

fn store(dir: &Path, attempted: &'static str, source: rocksdb::Error) -> LogError {
    LogError::Store {
        dir: dir.into(),
        attempted,
        source,
    }
}

fn encode_head(head: &Head) -> Vec<u8> {
    [head.seq.0.to_be_bytes().as_slice(), &head.chain].concat()
}

fn decode_head(value: &[u8]) -> Option<Head> {
    let (seq, chain) = value.split_first_chunk::<8>()?;
    Some(Head {
        seq: Seq(u64::from_be_bytes(*seq)),
        chain: Hash::try_from(chain).ok()?,
    })
}

impl EventLog for RocksLog {
    fn head(&self) -> Head {
        self.head.clone()
    }

    fn damage_at(&self, seq: Seq, why: String) -> LogError {
        self.damaged(seq, why)
    }

    fn bind(&mut self, identity: &str) -> Result<(), LogError> {
        match self.meta(IDENTITY)? {
            Some(ours) if ours == identity.as_bytes() => Ok(()),
            Some(ours) => Err(LogError::OtherStream {
                dir: self.dir.clone(),
                ours: String::from_utf8_lossy(&ours).into_owned(),
                theirs: identity.into(),
            }),
            None => {
                let mut batch = WriteBatch::default();
                batch.put_cf(self.family(META), IDENTITY, identity);
                self.write(batch)
            }
        }
    }

    fn append(&mut self, entries: &[Entry]) -> Result<(), LogError> {
        let mut head = self.head.clone();
        let mut batch = WriteBatch::default();
        for entry in entries {
            if entry.seq != head.seq.next() {
                return Err(LogError::NotNext {
                    expected: head.seq.next(),
                    found: entry.seq,
                });
            }
            head = entry.after(&head);
            batch.put(entry.seq.0.to_be_bytes(), entry.encode(&head.chain));
            if let Some((envelope, event)) = &entry.event {
                for (group, key) in index::keys(entry.seq, envelope, event) {
                    batch.put_cf(self.family(group.name()), key, []);
                }
            }
        }
        batch.put_cf(self.family(META), HEAD, encode_head(&head));
        self.write(batch)?;
        self.head = head;
        Ok(())
    }

    fn get(&self, seq: Seq) -> Result<Option<Record>, LogError> {
        let key = seq.0.to_be_bytes();
        let value = self
            .db
            .get_pinned(key)
            .map_err(|source| store(&self.dir, "reading a record", source))?;
        value
            .map(|value| Record::decode(seq, &value).map_err(|why| self.damaged(seq, why)))
            .transpose()
    }

    fn scan(&self, from: Seq, each: &mut dyn FnMut(Record) -> bool) -> Result<(), LogError> {
        let mut expected = from.max(Seq(1));
        let start = expected.0.to_be_bytes();
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(1 << 20);
        let records = self
            .db
            .iterator_opt(IteratorMode::From(&start, Direction::Forward), options);
        for item in records {
            let record = self.record(item)?;
            if record.seq != expected {
                return Err(self.damaged(
                    expected,
                    format!("the record is missing, the next one is {}", record.seq),
                ));
            }
            expected = expected.next();
            if !each(record) {
                break;
            }
        }
        Ok(())
    }

    fn thin(&mut self, through: Seq, max: usize) -> Result<usize, LogError> {
        let from = self.thinned()?.next();
        if from > through {
            return Ok(0);
        }
        let mut seqs = self.find(&Index::Kind(HEAT.into()), from, max)?;
        // More may follow before `through` only when as many as were asked for stand before it.
        let more = seqs.len() == max && seqs.last().is_some_and(|last| *last <= through);
        seqs.retain(|seq| *seq <= through);
        let done = if more {
            seqs.last().copied().unwrap_or(through)
        } else {
            through
        };
        let mut batch = WriteBatch::default();
        for seq in &seqs {
            let record = self
                .get(*seq)?
                .ok_or_else(|| self.damaged(*seq, "the record is missing"))?;
            batch.put(seq.0.to_be_bytes(), record.thin().encode());
        }
        batch.put_cf(self.family(META), THINNED, done.0.to_be_bytes());
        self.write(batch)?;
        Ok(seqs.len())
    }

    fn thinned(&self) -> Result<Seq, LogError> {
        let value = self.meta(THINNED)?;
        let seq = value.map(|v| <[u8; 8]>::try_from(v.as_slice()).map(u64::from_be_bytes));
        match seq {
            None => Ok(Seq(0)),
            Some(Ok(seq)) => Ok(Seq(seq)),
            Some(Err(_)) => Err(self.damaged(Seq(0), "how far it was thinned cannot be read")),
        }
    }

    fn put_snapshot(&mut self, at: Seq, bytes: &[u8]) -> Result<(), LogError> {
        let path = self.snapshot_path(at);
        let fresh = path.with_extension("fresh");
        let dir = self.dir.join(SNAPSHOTS);
        let written = || {
            std::fs::create_dir_all(&dir)?;
            let mut file = std::fs::File::create(&fresh)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&fresh, &path)?;
            std::fs::File::open(&dir)?.sync_all()
        };
        written().map_err(|source| self.io(source))
    }

    fn snapshots(&self) -> Result<Vec<Seq>, LogError> {
        let entries = match std::fs::read_dir(self.dir.join(SNAPSHOTS)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.io(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(|source| self.io(source))?.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".snapshot"));
            found.extend(number.and_then(|n| n.parse().ok()).map(Seq));
        }
        found.sort();
        Ok(found)
    }

    fn snapshot(&self, at: Seq) -> Result<Option<Vec<u8>>, LogError> {
        match std::fs::read(self.snapshot_path(at)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.io(error)),
        }
    }

    fn drop_snapshot(&mut self, at: Seq) -> Result<(), LogError> {
        std::fs::remove_file(self.snapshot_path(at)).map_err(|source| self.io(source))
    }

    fn find(&self, index: &Index, from: Seq, max: usize) -> Result<Vec<Seq>, LogError> {
        let prefix = index.prefix();
        let start = index.key(from);
        let keys = self.db.iterator_cf(
            self.family(index.group().name()),
            IteratorMode::From(&start, Direction::Forward),
        );
        let mut found = Vec::new();
        for item in keys {
            let (key, _) = item.map_err(|source| store(&self.dir, "reading an index", source))?;
            if found.len() == max || !key.starts_with(&prefix) {
                break;
            }
            found.extend(index::seq_of(&key));
        }
        Ok(found)
    }

    fn seq_at_time(&self, time: WallMs) -> Result<Option<Seq>, LogError> {
        let last = index::time_key(time, Seq(u64::MAX));
        let mut keys = self.db.iterator_cf(
            self.family(Group::Time.name()),
            IteratorMode::From(&last, Direction::Reverse),
        );
        let found = keys.next().transpose();
        let found = found.map_err(|source| store(&self.dir, "reading an index", source))?;
        Ok(found.and_then(|(key, _)| index::seq_of(&key)))
    }
}
