//! Names that nothing is known by, and what they may have been meant to be.

/// The first of the names that takes the fewest edits to become, if they are at most a third of its letters.
pub fn nearest<'a>(name: &str, all: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = all.into_iter().map(|one| (edits(name, one), one)).min_by_key(|(edits, _)| *edits);
    near.filter(|(edits, one)| 3 * edits <= one.chars().count()).map(|(_, one)| one)
}

/// Letters to insert, remove, replace or swap with their neighbour until one name is the other.
fn edits(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    // rows of the table: two letters ago, one ago, now
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for i in 0..one.len() {
        let mut row = vec![i + 1];
        for j in 0..other.len() {
            let replaced = last[j] + usize::from(one[i] != other[j]);
            let mut fewest = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && one[i] == other[j - 1] && one[i - 1] == other[j] {
                fewest = fewest.min(before[j - 1] + 1);
            }
            row.push(fewest);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_what_a_typist_does_wrong() {
        for (one, other, want) in
            [("", "", 0), ("", "abc", 3), ("prodcut", "product", 1), ("linaer", "linear", 1), ("kitten", "sitting", 3)]
        {
            assert_eq!((edits(one, other), edits(other, one)), (want, want), "{one} {other}");
        }
    }

    #[test]
    fn only_what_is_near_is_meant() {
        let names = ["product", "random", "round_robin"];
        assert_eq!(nearest("radnom", names), Some("random"));
        assert_eq!(nearest("round-robin", names), Some("round_robin"));
        assert_eq!(nearest("quick", names), None);
        assert_eq!(nearest("x".repeat(1000).as_str(), names), None);
    }
}
