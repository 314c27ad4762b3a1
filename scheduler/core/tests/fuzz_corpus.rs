//! Every input that fuzzing kept, and every one that once was a finding, through the body of the fuzz target `codec`
//! (`fuzz/bodies/codec.rs`), which says what must hold.

#[path = "../../../fuzz/bodies/codec.rs"]
mod codec;

use std::path::Path;

#[test]
fn messages_and_histories_replay() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/codec");
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        codec::run(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count > 10);
}
