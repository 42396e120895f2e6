//! Text to train on, found at run time: this project's own documents and sources, then the Rust book that comes with the toolchain.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// Documents of the project and of the installed toolchain, at most about `limit` bytes of them.
///
/// # Errors
/// If a file of the project cannot be read.
pub fn find(limit: usize) -> Result<Vec<String>, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> = [root.join("README.md")].into_iter().filter(|f| f.is_file()).collect();
    for (folder, extension) in [("docs", "md"), ("src", "rs"), ("kernels", "rs")] {
        files.extend(files_below(&root.join(folder))?.into_iter().filter(|f| f.extension().is_some_and(|e| e == extension)));
    }
    let book = rust_book().map_or(Ok(Vec::new()), |book| files_below(&book))?;
    files.extend(book.into_iter().filter(|f| f.extension().is_some_and(|e| e == "html") && !f.ends_with("print.html")));
    documents(&files, limit)
}

/// The documents at `path`: one file, or every text file of a folder; at most about `limit` bytes of them.
///
/// # Errors
/// If `path` cannot be read, or holds no text.
pub fn read(path: &Path, limit: usize) -> Result<Vec<String>, Box<dyn Error>> {
    let unreadable = |e: io::Error| format!("cannot read the text at {}: {e}", path.display());
    let files = if fs::metadata(path).map_err(unreadable)?.is_dir() { files_below(path)? } else { vec![path.to_owned()] };
    let found = documents(&files, limit)?;
    if found.is_empty() {
        return Err(format!("{} holds no text; expected a UTF-8 text file or a folder of them", path.display()).into());
    }
    Ok(found)
}

fn documents(files: &[PathBuf], limit: usize) -> Result<Vec<String>, Box<dyn Error>> {
    let mut found = Vec::new();
    let mut bytes = 0;
    for file in files {
        if bytes >= limit {
            break;
        }
        let content = fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
        let Ok(content) = String::from_utf8(content) else { continue };
        let content = if file.extension().is_some_and(|e| e == "html") { html_text(&content) } else { content };
        if !content.trim().is_empty() {
            bytes += content.len();
            found.push(content);
        }
    }
    Ok(found)
}

/// Every file below `folder`, in the order of their paths; none if there is no such folder. Links are not followed.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|e| format!("cannot list {}: {e}", folder.display()))?,
        };
        for entry in entries {
            let entry = entry.map_err(|e| format!("cannot list {}: {e}", folder.display()))?;
            match entry.file_type().map_err(|e| format!("cannot look at {}: {e}", entry.path().display()))? {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The folder of the Rust book, if this toolchain has its documentation installed.
fn rust_book() -> Option<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().ok().filter(|o| o.status.success())?;
    let sysroot = String::from_utf8(output.stdout).ok()?;
    Some(Path::new(sysroot.trim()).join("share/doc/rust/html/book")).filter(|book| book.is_dir())
}

/// What a reader sees of an HTML page's main part: the tags go, the common entities become characters.
fn html_text(page: &str) -> String {
    let Some((_, main)) = page.split_once("<main>") else { return String::new() };
    let main = main.split("</main>").next().unwrap_or_default();
    let mut text = String::with_capacity(main.len());
    let mut in_tag = false;
    for c in main.chars() {
        match c {
            '<' => in_tag = true,
            '>' if in_tag => in_tag = false,
            c if !in_tag => text.push(c),
            _ => {}
        }
    }
    [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&#x27;", "'"), ("&amp;", "&")]
        .iter()
        .fold(text, |text, (entity, character)| text.replace(entity, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_lose_their_tags_and_keep_their_words() {
        let page = "<html><nav>no</nav><main><h1>A &amp; B</h1>\n<p>if a &lt; b</p></main><footer>no</footer></html>";
        assert_eq!(html_text(page), "A & B\nif a < b");
        assert_eq!(html_text("<html>a page that only redirects</html>"), "");
    }

    #[test]
    fn the_project_has_text_and_the_limit_holds() {
        let own = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
        assert!(find(usize::MAX).unwrap().contains(&own));
        let little = find(1).unwrap();
        assert_eq!(little.len(), 1);
        assert_eq!(little, find(1).unwrap());
    }

    #[test]
    fn a_path_that_is_no_text_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        assert!(read(&missing, 1).unwrap_err().to_string().contains("missing"));
        assert!(read(folder.path(), 1).unwrap_err().to_string().contains("holds no text"));
        fs::write(folder.path().join("a.txt"), "some text").unwrap();
        assert_eq!(read(folder.path(), 1).unwrap(), ["some text"]);
    }
}
