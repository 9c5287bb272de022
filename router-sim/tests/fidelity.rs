//! The recorded runs of `tests/fixtures/runs`, replayed: what was recorded on a quiet machine the simulator comes near to.

use std::path::PathBuf;

use flate2::read::GzDecoder;
use router_sim::{Fidelity, RecordedRun, validate};

/// A machine of which others use no more is quiet.
const QUIET: f64 = 0.15;

fn fixtures() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/runs");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).expect("the fixtures").map(|f| f.expect("one").path()).collect();
    files.sort();
    let read = |file: PathBuf| (file.display().to_string(), std::fs::read(&file).expect("a fixture"));
    files.into_iter().filter(|file| file.to_string_lossy().ends_with(".json.gz")).map(read).collect()
}

fn fidelity(bytes: &[u8]) -> Fidelity {
    validate(&RecordedRun::parse(bytes).expect("a recording")).expect("it can be replayed")
}

#[test]
fn the_simulator_comes_near_to_recorded_runs() {
    let all = fixtures();
    assert!(all.len() >= 3, "recordings: {}", all.len());
    for (file, bytes) in all {
        let fidelity = fidelity(&bytes);
        println!("{fidelity}\n");
        assert!(fidelity.runs >= 3, "{file}: the runs' own spread takes three");
        // timers keep their time on a busy machine; what computes does not
        if fidelity.busy_before <= QUIET || fidelity.name.starts_with("mock") {
            assert!(fidelity.holds(), "{file}\n{fidelity}");
        }
    }
}

#[test]
fn a_replay_is_the_same_every_time() {
    let (file, bytes) = fixtures().swap_remove(0);
    assert_eq!(fidelity(&bytes), fidelity(&bytes), "{file}");
}

fn text() -> String {
    let (_, bytes) = fixtures().into_iter().find(|(file, _)| file.contains("mock_4_workers.")).expect("there");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut GzDecoder::new(&bytes[..]), &mut text).expect("text");
    text
}

#[test]
fn mistakes_in_a_recording_name_their_place() {
    let good = text();
    let cases = [
        ("\"scls-router run 1\"", "\"scls-router run 9\"", "format: it is \"scls-router run 9\""),
        ("\"policy\":\"product\"", "\"policy\":\"best\"", "no such policy: best"),
        ("\"scheduler\":\"slice\"", "\"scheduler\":\"best\"", "no such scheduler: best"),
        ("\"block_size\":16", "\"block_size\":0", "runs[0].workers[0]: a size is 0"),
        ("\"block_size\":16", "\"block_size\":17", "runs[0].workers[1]: its block size"),
        ("\"blocks\":2048", "\"blocks\":-1", "runs[0].workers[0].blocks: invalid value"),
        ("\"per_row\":0.0003", "\"per_row\":-0.0003", "runs[0].workers[0].cost_model: step.per_row is -"),
        ("\"parent\":null", "\"parent\":9", "runs[0].requests[0].parent: 9 does not come before it"),
        ("\"keep\":256", "\"keep\":2569", "runs[0].requests["),
        ("\"output\":1,", "\"output\":0,", "runs[0].requests[0]: an empty prompt, no output"),
        ("\"first_us\":", "\"first_us\":999999", "runs[0].requests[0]: arrived, first token and end"),
        ("\"batches\":[{\"worker\":", "\"batches\":[{\"worker\":7", "runs[0].batches[0].worker: there are 4"),
        ("\"runs\":", "\"walks\":", ".: missing field `runs`"),
        ("{\"format\"", "{{\"format\"", "?: key must be a string"),
    ];
    for (old, new, says) in cases {
        assert!(good.contains(old), "{old} in a fixture");
        let error = RecordedRun::parse(good.replacen(old, new, 1).as_bytes()).expect_err(new).to_string();
        assert!(error.starts_with(says), "{new}: {error}");
    }
}

#[test]
fn a_recording_that_broke_off_is_told() {
    let (_, packed) = fixtures().swap_remove(0);
    for part in [3, 17, packed.len() / 2, packed.len() - 4] {
        let error = RecordedRun::parse(&packed[..part]).expect_err("broken").to_string();
        assert!(error.contains("cannot be unpacked") && error.lines().count() == 2, "{part}: {error}");
    }
    RecordedRun::parse(b"").expect_err("nothing");
}

/// Whatever stands in a recording, it is read and replayed or refused.
#[test]
fn no_number_in_a_recording_panics() {
    let good = text();
    let places: Vec<usize> = good.match_indices(|c: char| c.is_ascii_digit()).map(|(at, _)| at).collect();
    for (round, junk) in
        ["99999", "-", "0", "1e9", ".5", "18446744073709551615"].into_iter().cycle().take(60).enumerate()
    {
        let at = places[(round * 7919 + round * round * 104_729) % places.len()];
        let mut bad = good.clone();
        bad.replace_range(at..=at, junk);
        if let Ok(recorded) = RecordedRun::parse(bad.as_bytes()) {
            drop(validate(&recorded));
        }
    }
}
