//! Names that nothing is known by, and what they may have been meant to be.

/// The first of the names that takes the fewest edits to become, if they are at most a third of its letters.
pub fn nearest<'a>(name: &str, all: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // letters to insert, remove, replace or swap with their neighbour
    let near = all.into_iter().map(|one| (strsim::osa_distance(name, one), one)).min_by_key(|(edits, _)| *edits);
    near.filter(|(edits, one)| 3 * edits <= one.chars().count()).map(|(_, one)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_near_is_meant() {
        let names = ["product", "random", "round_robin"];
        assert_eq!(nearest("prodcut", names), Some("product"));
        assert_eq!(nearest("radnom", names), Some("random"));
        assert_eq!(nearest("round-robin", names), Some("round_robin"));
        assert_eq!(nearest("quick", names), None);
        assert_eq!(nearest("x".repeat(1000).as_str(), names), None);
    }
}
