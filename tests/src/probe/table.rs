//! Text in columns. Pure.

/// Columns as wide as their widest cell; figures to the right, words to the left.
pub(super) fn render(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    let is_number = |text: &str| text.parse::<f64>().is_ok();
    let columns: Vec<(usize, bool)> = heads
        .iter()
        .enumerate()
        .map(|(index, head)| {
            let cells = || rows.iter().filter_map(|row| row.get(index));
            let width = cells().map(String::len).max().unwrap_or(0).max(head.len());
            (width, rows.is_empty() || !cells().all(|cell| is_number(cell)))
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let cells: Vec<String> = cells
            .iter()
            .zip(&columns)
            .map(
                |(cell, (width, left))| {
                    if *left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    let head = line(heads.to_vec());
    rows.iter().fold(head, |text, row| text + &line(row.iter().map(String::as_str).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "5".to_owned()], vec!["long".to_owned(), "500".to_owned()]];
        assert_eq!(render(&["name", "n"], rows.into_iter()), "name    n\na       5\nlong  500\n");
    }
}
