//! The store's metadata files: image, layer, bitmap and journal, each with any content.
//!
//! What must hold: no panic; a file whose checksum does not fit is refused; what is taken, encodes and reads back
//! the same; a journal changes only blocks of its layer, and nothing counts behind its first damaged record.

use std::path::Path;

use hearth_node::store::{
    BITMAP, BlockState, IMAGE_META, ImageMeta, JournalRecord, LAYER_META, LayerMeta, Trust, apply, decode_bitmap,
    encode_record, records, sealed_file,
};

/// Blocks of the layer whose bitmap and journal are read.
const BLOCKS: u64 = 100_000;
const RECORD_BYTES: usize = 32;

/// The first byte says which file, and whether the rest is the file or a body that gets a right checksum.
pub fn run(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let path = Path::new("fuzzed");
    let sealed = |kind: sealed_file::Kind, raw: bool| {
        if raw {
            return sealed_file::decode(path, kind, rest.to_vec()).ok();
        }
        let file = [sealed_file::header(kind, rest).as_bytes(), rest].concat();
        let body = sealed_file::decode(path, kind, file).expect("a file with its checksum is whole");
        assert_eq!(body, rest);
        Some(body)
    };
    let raw = kind & 8 != 0;
    match kind % 4 {
        0 => {
            if let Some(meta) = sealed(IMAGE_META, raw).and_then(|body| ImageMeta::decode(path, &body).ok()) {
                assert_eq!(
                    ImageMeta::decode(path, &meta.encode()).expect("what was taken, encodes"),
                    meta
                );
                let _ = meta.top();
            }
        }
        1 => {
            if let Some(meta) = sealed(LAYER_META, raw).and_then(|body| LayerMeta::decode(path, &body).ok()) {
                assert!(meta.block_size > 0 && meta.blocks() <= 1 << 32);
            }
        }
        2 => {
            if let Some((_, map)) = sealed(BITMAP, raw).and_then(|body| decode_bitmap(path, BLOCKS, &body).ok()) {
                let again = hearth_node::store::BlockMap::decode(BLOCKS, &map.encode()).expect("a map encodes");
                assert_eq!(again.encode(), map.encode());
                assert!(map.data_blocks() <= BLOCKS);
            }
        }
        _ => journal(rest, raw),
    }
}

/// `raw`: a journal file as it is. Otherwise 18 bytes make one record with a right checksum.
fn journal(bytes: &[u8], raw: bool) {
    const GENERATION: u32 = 7;
    let file = if raw {
        bytes.to_vec()
    } else {
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let record = |(place, raw): (usize, &[u8])| {
            let at = (place * RECORD_BYTES) as u64;
            encode_record(
                raw[0],
                GENERATION + u32::from(raw[1] == 1),
                number(&raw[2..10]),
                number(&raw[10..18]),
                at,
            )
        };
        bytes.chunks_exact(18).enumerate().flat_map(record).collect()
    };
    let (all, none_dropped) = records(&file, GENERATION, Trust::All);
    assert_eq!(none_dropped, 0);
    let (committed, dropped) = records(&file, GENERATION, Trust::Committed);
    assert!(all.starts_with(&committed) && all.len() == committed.len() + dropped);
    assert!(all.len() <= file.len() / RECORD_BYTES);
    let map = hearth_node::store::BlockMap::new(BLOCKS);
    let fits = |record: &JournalRecord| match *record {
        JournalRecord::Blocks { first, count, .. } => first.checked_add(count).is_some_and(|end| end <= BLOCKS),
        JournalRecord::Commit { .. } => false,
    };
    let sound = all.iter().all(fits);
    assert_eq!(apply(Path::new("fuzzed"), &map, &all).is_ok(), sound);
    if let (true, Some(JournalRecord::Blocks { first, count, state })) = (sound, all.last())
        && *count > 0
    {
        assert!(*state != BlockState::Absent && map.get(*first) == *state);
    }
}
